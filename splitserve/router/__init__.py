"""The router: one request's life (`journey`), who is in the fleet (`membership`), the gRPC services."""
