"""Who is told a row of figures besides `metrics.jsonl`: TensorBoard, Prometheus, Weights & Biases, MLflow."""
