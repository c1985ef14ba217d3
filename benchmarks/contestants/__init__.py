"""What mbcap-watch is measured against; each is a small program of its own."""
