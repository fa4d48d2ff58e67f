"""The teacher's answers, written once and read by every later epoch and job: coders, blocks, store, and the client."""
