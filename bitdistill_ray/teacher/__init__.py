"""The teacher service: frozen FP16 models as Ray actors, the pool that places them, the client that students pull with."""
