"""Settings of a gateway process of its own. In a router's process the router's settings say all this."""

from pydantic import Field

from splitserve.core.config import Address, ClientTls, Count, Seconds, Settings, TlsSettings


class GatewayConfig(Settings):
    """One gateway process."""

    router: str = Field(
        "127.0.0.1:50051",
        description="a router's gRPC address, or several with commas between them; a name stands for all its addresses",
    )
    router_tls: ClientTls | None = Field(None, description="TLS towards the routers; none unless said")
    listen: Address = "127.0.0.1:8000"
    metrics: Address | None = Field(
        None, description="Prometheus address, with /livez and /readyz; /metrics of `listen` is there in any case"
    )
    tls: TlsSettings | None = Field(None, description="serve HTTPS; plain HTTP unless said")
    insecure: bool = Field(False, description="let others than this machine reach plain HTTP")
    model: str | None = Field(
        None, description="model directory, or demo: log probabilities then have tokens' texts, else token_id:7"
    )
    console: bool = Field(True, description="serve the operators' page at /console")
    max_body_mib: Count = Field(32, description="largest body of a request, MiB: a million-token prompt takes 7")
    body_timeout_s: Seconds = Field(60.0, description="how long a client may take to send one")
    client_stall_s: Seconds = Field(60.0, description="a client that takes nothing for so long is cut off")
    drain_timeout_s: float = Field(30.0, ge=0, description="how long running requests get to end on SIGTERM")
