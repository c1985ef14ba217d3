"""What a bridge reports: its stats, Prometheus, systemd, the log, the publisher's answer."""
