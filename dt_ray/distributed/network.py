"""Lets workers on several nodes connect: by default gloo listens at a host name's address, which may be a loopback."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class NodeTorchConfig(TorchConfig):
    """Makes gloo use the network interface of the node's address, unless GLOO_SOCKET_IFNAME names another one."""

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
    """The network interface that has this IPv4 address; None where there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family == socket.AF_INET and each.address == address for each in addresses):
            return name
    return None
