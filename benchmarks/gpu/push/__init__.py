"""What a push of KV costs between two processes on one GPU."""
