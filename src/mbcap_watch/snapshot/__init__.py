"""The hand-off file: what its bytes mean, reading it safely, publishing it atomically."""
