"""Workers on several nodes find each other: gloo listens where a host's name points to, which may be its loopback."""

from __future__ import annotations

import os
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any

import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

GET_ADDRESS = 0x8915  # Linux' SIOCGIFADDR, of an interface's IPv4 address


@dataclass
class NodeTorchConfig(TorchConfig):
    """Ray Train's, with gloo on the network interface of the node's address, unless GLOO_SOCKET_IFNAME says another."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _NodeBackend


class _NodeBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Sets GLOO_SOCKET_IFNAME in a worker's process."""
    if (name := find_interface(ray.util.get_node_ip_address())) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def find_interface(address: str) -> str | None:
    """The network interface that has this IPv4 address; None where there is none, or no way to know."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, GET_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
