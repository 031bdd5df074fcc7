"""What print-config prints is what the hypervisor's own parser would take."""

from __future__ import annotations

import json
import shlex
from xml.etree import ElementTree

import pytest

from .conftest import Run


def options(text: str) -> dict[str, str]:
    """A printed shell command line as option -> value."""
    words = shlex.split(text.replace("\\\n", " "))
    return dict(zip(words[::2], words[1::2], strict=True))


def test_qemu_gets_shared_memory_a_chardev_and_a_device(run: Run) -> None:
    done = run("vhostuser", "print-config", "/run/a disk,1.sock", "--for", "qemu", "--queues", "4", "--memory", "512M")
    assert done.returncode == 0
    assert options(done.stdout) == {
        "-m": "512M",
        "-object": "memory-backend-memfd,id=mem,size=512M,share=on",
        "-machine": "memory-backend=mem",
        "-chardev": "socket,id=vhostuser0,path=/run/a disk,,1.sock",
        "-device": "vhost-user-blk-pci,chardev=vhostuser0,num-queues=4",
    }
    assert done.stderr.startswith("# ")


@pytest.mark.parametrize(
    ("version", "option"), [("7.2", "reconnect=1"), ("9.1.2", "reconnect=1"), ("9.2", "reconnect-ms=1000")]
)
def test_the_reconnect_option_is_spelt_for_the_version_of_qemu(run: Run, version: str, option: str) -> None:
    done = run("vhostuser", "print-config", "/run/a.sock", "--for", "qemu", "--qemu-version", version)
    assert options(done.stdout)["-chardev"].split(",")[-1] == option


def test_qemu_reaches_an_abstract_socket(run: Run) -> None:
    done = run("vhostuser", "print-config", "@disk", "--for", "qemu")
    assert options(done.stdout)["-chardev"] == "socket,id=vhostuser0,path=disk,abstract=on"


def test_libvirt_gets_the_parts_of_a_domain(run: Run) -> None:
    done = run("vhostuser", "print-config", "/run/a<&'.sock", "--for", "libvirt", "--queues", "2")
    domain = ElementTree.fromstring(done.stdout)
    access = domain.find("memoryBacking/access")
    source = domain.find("devices/disk/source")
    driver = domain.find("devices/disk/driver")
    assert access is not None
    assert source is not None
    assert driver is not None
    assert access.attrib == {"mode": "shared"}
    assert source.attrib == {"type": "unix", "path": "/run/a<&'.sock"}
    assert driver.attrib["queues"] == "2"


def test_firecracker_gets_the_body_of_a_drive(run: Run) -> None:
    done = run("vhostuser", "print-config", "/run/a.sock", "--for", "firecracker")
    assert json.loads(done.stdout) == {
        "drive_id": "disk0",
        "socket": "/run/a.sock",
        "is_root_device": False,
        "cache_type": "Writeback",
    }


def test_cloud_hypervisor_gets_shared_memory_and_a_disk(run: Run) -> None:
    done = run("vhostuser", "print-config", "/run/a.sock", "--for", "cloud-hypervisor", "--queues", "3")
    assert options(done.stdout) == {
        "--memory": "size=4G,shared=on",
        "--disk": "vhost_user=on,socket=/run/a.sock,num_queues=3,queue_size=128",
    }


def test_crosvm_gets_a_vhost_user_device(run: Run) -> None:
    done = run("vhostuser", "print-config", "/run/a.sock", "--for", "crosvm")
    assert options(done.stdout) == {"--vhost-user": "type=block,socket=/run/a.sock"}


def test_a_relative_path_is_made_absolute(run: Run) -> None:
    done = run("vhostuser", "print-config", "a.sock", "--for", "crosvm")
    assert ",socket=/" in done.stdout
