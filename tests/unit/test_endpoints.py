# SPDX-License-Identifier: Apache-2.0
"""The built-in endpoints, compared with a list written by hand; and the DMI of the machine."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from imds_guard.errors import BadPolicy
from imds_guard.kernel.dmi import dmi_text
from imds_guard.policy.builtin import (
    BUILT_IN,
    PRESETS,
    WIRESERVER,
    DefaultOn,
    builtin,
    default_endpoints,
    preset_endpoints,
)
from imds_guard.policy.endpoint_syntax import doubts_about, parse_endpoint
from imds_guard.policy.model import Endpoint, Protocol
from imds_guard.policy.ports import ALL_PORTS, minus_ports

EVERYWHERE = {
    "169.254.169.254",
    "169.254.42.42",
    "169.254.0.23",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fd00:c1::a9fe:a9fe",
    "fe80::a9fe:a9fe",
    "fd00:a9fe:a9fe::1",
    "fd00:42::42",
    "fd00:100::100:200",
}
ON_THEIR_CLOUD = {"100.100.100.200", "100.96.0.96", "168.63.129.16", "192.0.0.192"}
CREDENTIALS = {"169.254.170.2", "169.254.170.23", "fd00:ec2::23"}

AZURE_DMI = "Microsoft Corporation\nVirtual Machine\n7783-7084-3265-9085-8269-3286-77"


def addresses(endpoints: tuple[Endpoint, ...]) -> set[str]:
    return {str(endpoint.network.network_address) for endpoint in endpoints}


def test_the_table_has_the_addresses_of_the_list_and_no_others() -> None:
    assert {str(entry.address) for entry in BUILT_IN} == EVERYWHERE | ON_THEIR_CLOUD | CREDENTIALS


def test_every_entry_has_services_with_a_source() -> None:
    for entry in BUILT_IN:
        assert entry.services, entry.address
        assert all(service.source and service.presets and service.ports for service in entry.services), entry.address


def test_a_built_in_endpoint_is_tcp_on_every_port_but_dns() -> None:
    for entry in BUILT_IN:
        assert entry.endpoint.udp == (), entry.address
        free = ((53, 53), (67, 67)) if entry.address == WIRESERVER else ((53, 53),)
        assert free == minus_ports(ALL_PORTS, entry.endpoint.tcp), entry.address


def test_the_defaults_of_a_machine_without_dmi_are_the_link_local_and_listed_unique_local_addresses() -> None:
    found = default_endpoints("")
    assert addresses(found) == EVERYWHERE
    assert all(endpoint.network.is_link_local or endpoint.network.is_private for endpoint in found)


@pytest.mark.parametrize(
    ("dmi", "added"),
    [
        ("Alibaba Cloud\nAlibaba Cloud ECS", {"100.100.100.200"}),
        ("alibaba cloud", {"100.100.100.200"}),
        (AZURE_DMI, {"168.63.129.16"}),
        ("Volcengine", {"100.96.0.96"}),
        ("OracleCloud.com", {"192.0.0.192"}),
        ("innotek GmbH\nVirtualBox\nOracle Corporation", set()),
        ("Amazon EC2\nm5.large", set()),
        ("Microsoft Corporation\nVirtual Machine", set()),
    ],
)
def test_public_and_shared_addresses_are_default_only_where_dmi_names_their_cloud(dmi: str, added: set[str]) -> None:
    """The vendors of Hyper-V and VirtualBox run clouds too, but their DMI does not name a cloud."""
    assert EVERYWHERE | added == addresses(default_endpoints(dmi))


def test_all_is_everything_but_credentials_for_containers() -> None:
    assert addresses(preset_endpoints("all")) == EVERYWHERE | ON_THEIR_CLOUD


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"ecs", "eks"}))
def test_credentials_for_containers_are_in_no_other_preset(name: str) -> None:
    assert not CREDENTIALS & addresses(preset_endpoints(name, AZURE_DMI))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aws", {"169.254.169.254", "fd00:ec2::254"}),
        ("gcp", {"169.254.169.254", "fd20:ce::254"}),
        ("azure", {"169.254.169.254", "168.63.129.16"}),
        ("wireserver", {"168.63.129.16"}),
        ("alibaba", {"100.100.100.200", "fd00:100::100:200"}),
        ("scaleway", {"169.254.42.42", "fd00:42::42"}),
        ("ecs", {"169.254.170.2"}),
        ("eks", {"169.254.170.23", "fd00:ec2::23"}),
    ],
)
def test_a_preset_has_the_addresses_of_its_cloud(name: str, expected: set[str]) -> None:
    assert expected == addresses(preset_endpoints(name))


def test_the_default_preset_depends_on_dmi() -> None:
    assert default_endpoints(AZURE_DMI) == preset_endpoints("default", AZURE_DMI)
    assert default_endpoints("") == preset_endpoints("default")


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadPolicy, match="there is no preset 'amazon': choose one of default, all, akamai"):
        preset_endpoints("amazon")


def test_builtin_finds_a_mapped_address_and_no_other() -> None:
    mapped = builtin(ipaddress.ip_address("::ffff:169.254.169.254"))
    assert mapped is not None
    assert str(mapped.address) == "169.254.169.254"
    assert builtin(ipaddress.ip_address("169.254.169.253")) is None


def test_public_addresses_are_never_default_everywhere() -> None:
    public = [
        entry for entry in BUILT_IN if entry.address.is_global or entry.address in ipaddress.ip_network("100.64.0.0/10")
    ]
    assert public
    assert {DefaultOn.ITS_CLOUD} == {entry.default_on for entry in public}


def test_dns_and_ntp_over_udp_stay_open_by_default() -> None:
    for endpoint in default_endpoints(AZURE_DMI):
        assert endpoint.ports(Protocol.UDP) == ()


def test_dmi_is_read_from_the_files_that_exist(tmp_path: Path) -> None:
    (tmp_path / "sys_vendor").write_text("Alibaba Cloud\n")
    (tmp_path / "chassis_asset_tag").write_text("\n")
    (tmp_path / "product_name").mkdir()
    assert dmi_text(str(tmp_path)) == "Alibaba Cloud"


def test_without_dmi_the_text_is_empty(tmp_path: Path) -> None:
    assert dmi_text(str(tmp_path / "absent")) == ""


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("fd00::1:80", "for port 80 write [fd00::1]:80"),
        ("fd00::1:443,tcp", "for port 443 write [fd00::1]:443"),
        ("fd00::1", None),
        ("[fd00::1]:80", None),
        ("fd00::1:81", None),
        ("1:2:3:4:5:6:7:80", None),
        ("10.0.0.1:80", None),
    ],
)
def test_an_address_whose_end_looks_like_a_port_is_questioned(text: str, meant: str | None) -> None:
    """It is an address all the same."""
    assert parse_endpoint(text)
    doubts = doubts_about([text])
    assert len(doubts) == (meant is not None)
    assert meant is None or doubts[0].endswith(meant)
