"""The teacher service: frozen models as Ray actors, the pool that places them, the client that students pull with."""
