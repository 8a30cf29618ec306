"""What is checked on which machine, the quick things first."""

from collections.abc import Iterator
from pathlib import Path

from common.config.node import NodeConfig
from common.config.run import RunConfig
from deploy.doctor import job, machine, network
from deploy.doctor.budget import budget
from deploy.doctor.check import Check
from deploy.doctor.installed import bundles, installed, units
from deploy.site.folder import Site
from deploy.site.kit_facts import KitFacts


def node(kit: Path, address: str, port: int, facts: NodeConfig, config: RunConfig) -> Iterator[Check]:
    """Everything that can be known of a node before a run."""
    yield Check("versions", machine.versions)
    yield Check("clock", machine.clock)
    yield Check("disk", lambda: machine.disk(Path(facts.state_directory)))
    yield Check("installed", lambda: installed(kit))
    yield Check("units", lambda: units(kit))
    yield Check("bundles", lambda: bundles(kit))
    yield Check("key", lambda: network.node_key(kit / "node.key", kit / "node.pub"))
    yield Check("root", lambda: network.certificate(kit / "ca.crt"))
    yield Check("port", lambda: network.healthy_or_free(port))
    yield Check("superlink", lambda: network.superlink(address, kit / "ca.crt"))
    yield Check("quantisation", lambda: machine.quantisation(facts.devices))
    yield Check("model", lambda: job.model(config))
    yield Check("data", lambda: job.data(config, facts))
    yield Check("policy", lambda: job.policy(config, facts))
    yield Check("budget", lambda: budget(config, facts))
    yield Check("memory", lambda: job.memory(config, facts))
    yield Check("traffic", lambda: job.traffic(config))


def coordinator(site: Site, config: RunConfig) -> Iterator[Check]:
    """Everything that can be known of a coordinator before a run; its SuperLink may be running or not."""
    folder, facts = site.coordinator, site.facts
    yield Check("versions", machine.versions)
    yield Check("clock", machine.clock)
    yield Check("disk", lambda: machine.disk(Path(config.run_directory or KitFacts.read(folder).state)))
    yield Check("installed", lambda: installed(folder))
    yield Check("units", lambda: units(folder))
    yield Check("bundles", lambda: bundles(folder))
    yield Check("root key", lambda: network.secret(site.authority / "ca.key"))
    yield Check("server key", lambda: network.secret(folder / "server.key"))
    yield Check("secret", lambda: network.secret(folder / "superexec.secret"))
    yield Check("root", lambda: network.certificate(site.authority / "ca.crt"))
    server, root = folder / "server.crt", site.authority / "ca.crt"
    yield Check("certificate", lambda: network.certificate(server, root, facts.addresses))
    yield Check("fleet port", lambda: network.ours_or_free(facts.fleet_port, root))
    yield Check("flwr port", lambda: network.healthy_or_free(facts.control_port))
    yield Check("traffic", lambda: job.traffic(config))
