"""The student's side: Ray Train workers under DeepSpeed ZeRO that learn from a teacher pool."""
