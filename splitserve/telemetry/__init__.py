"""Every metric name once; structured logs with the request id."""
