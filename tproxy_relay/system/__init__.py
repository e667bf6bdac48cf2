"""What this process is and may: rights, limits, processors, signals, the service manager."""
