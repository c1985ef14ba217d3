"""When to sync, and why: inotify or polling, the health of the watch, and one scheduler."""
