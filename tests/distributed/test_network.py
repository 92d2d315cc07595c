"""The network interface of a node's own address."""

import socket

import psutil

from dt_ray.distributed.network import find_interface


def test_each_address_of_this_machine_has_its_interface() -> None:
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET:
                assert find_interface(each.address) == name


def test_an_address_of_another_machine_has_none() -> None:
    assert find_interface("198.51.100.7") is None
