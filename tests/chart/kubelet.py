"""What Kubernetes does for pods, as far as the chart relies on it: starts them, starts again what has died, asks
whether they are ready, lets Services lead to those that are, and stops them by hook, SIGTERM and grace period.

Everything happens in `step`, which whoever waits for something calls over and over; there are no threads.
"""

import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from itertools import count
from pathlib import Path
from types import MappingProxyType

from tests.chart.pods import Bridge, Content, Files, Names, Pod, service_name
from tests.chart.tools import Document

LOOK_S = 0.1
PROBE_S = 2.0
MOST_RESTARTS = 5
WORKLOADS = ("Deployment",)


class Cluster:
    """The pods of a rendered chart, by name."""

    def __init__(
        self, found: list[Document], secrets: Mapping[str, Files], directory: Path, bridge: Bridge, stack: ExitStack
    ) -> None:
        self._found = found
        self._directory = directory
        self._bridge = bridge
        self._stack = stack
        self._numbers = count()
        configs = {each["metadata"]["name"]: each["data"] for each in found if each["kind"] == "ConfigMap"}
        self._content = Content(configs, secrets)
        self._services = [each for each in found if each["kind"] == "Service"]
        self._leaving: set[str] = set()
        self._told: Names = ()
        self.pods: dict[str, Pod] = {}
        for workload in (each for each in found if each["kind"] in WORKLOADS):
            for at in range(workload["spec"]["replicas"]):
                self._make(f"{workload['metadata']['name']}-{at}", workload["spec"]["template"])
        for pod in self.pods.values():
            pod.start()

    def of(self, component: str, pool: str = "") -> list[Pod]:
        labels = {"app.kubernetes.io/component": component, **({"splitserve.io/pool": pool} if pool else {})}
        return [pod for pod in self.pods.values() if labels.items() <= pod.labels.items()]

    def until(self, condition: Callable[[], bool], what: str, within_s: float = 120.0) -> None:
        """Steps until it holds; fails with the pods' logs if it does not come about."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come about:\n{self.logs()}"
            self.step()
            time.sleep(LOOK_S)

    def until_ready(self) -> None:
        self.until(lambda: all(pod.ready for pod in self.pods.values()), "every pod ready")

    def step(self) -> None:
        for pod in self.pods.values():
            if pod.name in self._leaving:
                continue
            if pod.exit_code is not None:
                pod.restarts += 1
                assert pod.restarts < MOST_RESTARTS, f"{pod.name} does not stay up:\n{pod.output}"
                pod.start()
            pod.ready = probe(pod, "readinessProbe")
        self._tell_names()

    def client(self, manifest: Document, container: Document) -> Pod:
        """A pod of its own that runs this container once; the caller waits for its end."""
        pod = self._make(
            f"client-{next(self._numbers)}", {**manifest, "spec": {**manifest["spec"], "containers": [container]}}
        )
        del self.pods[pod.name]  # which is not looked after
        pod.say_names(self._told)
        pod.start()
        return pod

    def delete(self, pod: Pod) -> int:
        """As a rollout or a node's drain does; returns the exit code. It must end within its grace period."""
        self._leaving.add(pod.name)
        pod.ready = False
        self._tell_names()
        began = time.monotonic()
        grace_s = pod.manifest["spec"]["terminationGracePeriodSeconds"]
        hook = pod.container.get("lifecycle", {}).get("preStop")
        if hook is not None:
            assert pod.exec(*hook["exec"]["command"]).wait(grace_s) == 0
        pod.signal(15)
        return pod.ended(grace_s - (time.monotonic() - began))

    def replace(self, pod: Pod) -> None:
        """What the workload does once a pod of its is gone."""
        self._leaving.discard(pod.name)
        pod.start()

    def scale_up(self, workload: str) -> Pod:
        """One pod more of this Deployment, as it was rendered."""
        (made,) = [each for each in self._found if each["kind"] in WORKLOADS and each["metadata"]["name"] == workload]
        at = sum(name.startswith(f"{workload}-") for name in self.pods)
        pod = self._make(f"{workload}-{at}", made["spec"]["template"])
        pod.say_names(self._told)
        pod.start()
        return pod

    def scale_down(self, pod: Pod) -> int:
        """For good; returns its exit code."""
        code = self.delete(pod)
        del self.pods[pod.name]
        return code

    def logs(self) -> str:
        return "\n".join(f"--- {pod.name} (ready: {pod.ready})\n{pod.output[-3000:]}" for pod in self.pods.values())

    def _make(self, name: str, manifest: Document) -> Pod:
        pod = Pod(name, manifest, self._content, self._bridge)
        self._stack.enter_context(pod.made(self._directory))
        self.pods[name] = pod
        return pod

    def _tell_names(self) -> None:
        """A Service leads to one of its pods that are ready, the name of a headless one has the addresses of all."""
        told: list[tuple[str, str]] = []
        for service in self._services:
            spec, name = service["spec"], service_name(service["metadata"]["name"])
            chosen = [pod for pod in self.pods.values() if spec["selector"].items() <= pod.labels.items()]
            ready = [pod for pod in chosen if pod.ready or spec.get("publishNotReadyAddresses")]
            there = [pod for pod in ready if pod.name not in self._leaving]
            if spec.get("clusterIP") == "None":
                told += [(name, pod.address) for pod in there]
            elif there:
                told.append((name, there[0].address))
        names = tuple(told)
        if names != self._told:
            self._told = names
            for pod in self.pods.values():
                pod.say_names(names)


def probe(pod: Pod, kind: str) -> bool:
    """Whether one look, as the manifest describes it, finds the container well."""
    get = pod.container[kind]["httpGet"]
    (port,) = [each["containerPort"] for each in pod.container["ports"] if each["name"] == get["port"]]
    try:
        return bool(fetch(f"{get['scheme'].lower()}://{pod.address}:{port}{get['path']}").status == 200)
    except OSError:
        return False


def fetch(url: str) -> HTTPResponse:
    """By no proxy, and without looking at certificates, as a kubelet does. Raises OSError."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting))
    answer: HTTPResponse = opener.open(url, timeout=PROBE_S)
    return answer


@contextmanager
def cluster_of(
    found: list[Document], directory: Path, secrets: Mapping[str, Files] = MappingProxyType({})
) -> Iterator[Cluster]:
    """Its pods have been started."""
    with Bridge() as bridge, ExitStack() as stack:
        yield Cluster(found, secrets, directory, bridge, stack)
