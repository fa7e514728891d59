"""Values that between them turn on everything the chart has: what is rendered, validated and compared."""

from typing import Any

from tests.chart.tools import merged, values_file

SIMULATED = values_file("values-sim.yaml")
PLANNED = values_file("values-h100-70b.yaml") | {"insecure": True}

_MINIMAL: dict[str, Any] = {"model": {"name": "Qwen/Qwen3-8B"}, "insecure": True}
_SECURED: dict[str, Any] = {
    "insecure": False,
    "tls": {"mode": "secret", "secretName": "cert", "mutual": True},
    "apiKeys": {"secretName": "keys"},
}
_CERT_MANAGER = merged(
    _SECURED, {"tls": {"mode": "certManager", "certManager": {"issuerRef": {"name": "ours", "kind": "ClusterIssuer"}}}}
)
_OUTSIDE: dict[str, Any] = {
    "ingress": {"enabled": True, "hosts": ["llm.example"]},
    "grpcRoute": {"enabled": True, "parentRefs": [{"name": "edge"}]},
    "service": {"type": "LoadBalancer"},
    "gateway": {"enabled": True, "tokenTexts": True},
}
_MONITORED: dict[str, Any] = {
    "monitoring": {
        "enabled": True,
        "rules": True,
        "dashboard": {"enabled": True},
        "prometheusAddress": "http://prometheus:9090",
    }
}
_POOLS: dict[str, Any] = {
    "pools": {
        "prefill": {"role": "prefill", "workers": 2, "parallelism": {"tensor": 2}},
        "decode": {"role": "decode", "workers": 3},
        "decode-a100": {
            "role": "decode",
            "nodeSelector": {"splitserve.io/gpu": "a100"},
            "gpuResource": "nvidia.com/mig-3g",
        },
        "mixed": {"role": "colocated", "workers": 0},
    }
}
_SPANNING: dict[str, Any] = {
    "pools": {"decode": {"role": "decode", "nodesPerWorker": 2, "parallelism": {"tensor": 8, "pipeline": 2}}}
}
_RDMA: dict[str, Any] = {
    "kvTransfer": {
        "transport": "rdma",
        "rdma": {"resources": {"rdma/hca": 1}, "ipcLock": True, "netDevices": "mlx5_0:1"},
    }
}
_HUB: dict[str, Any] = {
    "model": {"hub": {"tokenSecret": {"name": "hub"}, "cache": {"persistentVolumeClaim": {"claimName": "models"}}}}
}


def _scaled(mode: str) -> dict[str, Any]:
    return {
        "poolDefaults": {"autoscaling": {"mode": mode, "targets": {"missed": True}}},
        "monitoring": _MONITORED["monitoring"],
        "slo": {"ttftSeconds": 0.5, "tpotSeconds": 0.05},
    }


_ROUTERS: dict[str, Any] = {"router": {"autoscaling": {"mode": "hpa"}, "resources": {"requests": {"cpu": 1}}}}


def _of(*parts: dict[str, Any]) -> dict[str, Any]:
    values = _MINIMAL
    for part in parts:
        values = merged(values, part)
    return values


VARIANTS: dict[str, dict[str, Any]] = {
    "simulated": SIMULATED,
    "planned": PLANNED,
    "minimal": _MINIMAL,
    "secured": _of(_SECURED, _OUTSIDE, _MONITORED, _POOLS, _HUB),
    "cert-manager": _of(_CERT_MANAGER, _OUTSIDE, _MONITORED),
    "hpa": _of(_scaled("hpa"), _POOLS, _ROUTERS),
    "keda": _of(_scaled("keda"), _POOLS),
    "spanning": _of(_SPANNING, _SECURED, _MONITORED),
    "spanning-keda": _of(_SPANNING, _scaled("keda"), {"pools": {"prefill": {"role": "prefill"}}}),
    "rdma": _of(_RDMA, _POOLS, {"placement": {"sameNode": True}}),
    "tcp": _of({"kvTransfer": {"transport": "tcp", "mode": "pull"}, "poolDefaults": {"parallelism": {"tensor": 2}}}),
    "claim": _of({"model": {"source": "pvc", "pvc": {"claimName": "models"}, "path": "qwen"}}),
    "node": _of(
        {
            "model": {"source": "hostPath", "hostPath": {"path": "/models"}},
            "poolDefaults": {"parallelism": {"tensor": 2}},
        }
    ),
    "closed": _of({"networkPolicy": {"egress": [{"ports": [{"port": 443}]}]}, "gateway": {"enabled": True}}),
    "bare": _of({"serviceAccount": {"create": False}, "networkPolicy": {"enabled": False}, "router": {"replicas": 3}}),
    "simulated-secured": merged(SIMULATED, merged(_CERT_MANAGER, _MONITORED)),
}
