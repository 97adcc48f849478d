# SPDX-License-Identifier: Apache-2.0
"""The metadata services of the clouds: where each one listens, and the source that says so.

At such an address, TCP on every port but 53 is locked. On some clouds (GCP, Oracle, Azure) the same address serves
DNS, NTP and DHCP, which a machine can't do without.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

from imds_guard.errors import BadPolicy
from imds_guard.policy.model import Address, Endpoint, Network, unmapped
from imds_guard.policy.ports import ALL_PORTS, Ports, minus_ports
from imds_guard.text import did_you_mean

DNS = ((53, 53),)
DNS_AND_DHCP = ((53, 53), (67, 67))


class DefaultOn(str, enum.Enum):
    """On which machines a built-in endpoint is locked by default."""

    EVERY_MACHINE = "default"
    """The address is link-local, or unique-local and listed by its vendor."""
    ITS_CLOUD = "on-its-cloud"
    """Where DMI names the cloud. Elsewhere the address is somebody else's host: public or shared address space."""
    NO_MACHINE = "on-request"
    """Only its own preset locks it: credentials for containers, which the containers need."""


class Service(NamedTuple):
    """A metadata service at an address."""

    name: str
    presets: tuple[str, ...]
    source: str
    ports: str = "80"
    """The ports that it is known to listen on, for display. BuiltIn.endpoint says which ports are locked."""


class BuiltIn(NamedTuple):
    """An address of the built-in table, with every service known there."""

    address: Address
    services: tuple[Service, ...]
    default_on: DefaultOn = DefaultOn.EVERY_MACHINE
    dmi: tuple[str, ...] = ()
    """On this cloud, DMI contains one of these strings, in upper or lower case."""
    excluded_ports: Ports = DNS
    """TCP ports that stay open."""
    note: str = ""

    @property
    def presets(self) -> tuple[str, ...]:
        """The presets that contain this address, without ``default`` and ``all``."""
        return tuple(dict.fromkeys(name for service in self.services for name in service.presets))

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that is locked when this address is named without ports."""
        return Endpoint(host_network(self.address), tcp=minus_ports(ALL_PORTS, self.excluded_ports))


def host_network(address: Address) -> Network:
    """The prefix of full length that contains only ``address``."""
    if isinstance(address, ipaddress.IPv4Address):
        return ipaddress.IPv4Network(address)
    return ipaddress.IPv6Network(address)


CLOUD_INIT = "cloud-init, cloudinit/sources/"
BOTOCORE = "botocore, botocore/utils.py"
AWS_SOURCE = "https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-instance-metadata.html"
EKS_SOURCE = "https://docs.aws.amazon.com/eks/latest/userguide/pod-id-how-it-works.html"
AZURE_SOURCE = "https://learn.microsoft.com/en-us/azure/virtual-network/what-is-ip-address-168-63-129-16"
OCI_SOURCE = "oci (Oracle's Python SDK), oci/auth/signers/instance_principals_security_token_signer.py"

WIRESERVER = ipaddress.ip_address("168.63.129.16")

BUILT_IN: tuple[BuiltIn, ...] = (
    BuiltIn(
        ipaddress.ip_address("169.254.169.254"),
        (
            Service("AWS EC2", ("aws",), AWS_SOURCE),
            Service("GCP", ("gcp",), "google-auth, google/auth/compute_engine/_metadata.py", "80, 443"),
            Service("Azure IMDS", ("azure",), CLOUD_INIT + "DataSourceAzure.py"),
            Service("Oracle Cloud", ("oracle",), CLOUD_INIT + "DataSourceOracle.py"),
            Service("OpenStack", ("openstack",), "https://docs.openstack.org/nova/latest/user/metadata.html"),
            Service("Hetzner", ("hetzner",), CLOUD_INIT + "DataSourceHetzner.py"),
            Service("Akamai (Linode)", ("akamai",), CLOUD_INIT + "DataSourceAkamai.py"),
            Service("DigitalOcean", ("digitalocean",), CLOUD_INIT + "DataSourceDigitalOcean.py"),
            Service("Vultr", ("vultr",), CLOUD_INIT + "DataSourceVultr.py"),
            Service("UpCloud", ("upcloud",), CLOUD_INIT + "DataSourceUpCloud.py"),
            Service("Exoscale", ("exoscale",), CLOUD_INIT + "DataSourceExoscale.py"),
            Service(
                "IBM Cloud",
                ("ibm",),
                "ibm-cloud-sdk-core, ibm_cloud_sdk_core/token_managers/vpc_instance_token_manager.py",
            ),
            Service("Huawei Cloud", ("huawei",), "huaweicloudsdkcore, huaweicloudsdkcore/auth/internal.py"),
            Service("Naver Cloud", ("naver",), "https://api.ncloud-docs.com/docs/en/compute-vmetadata-serverdata"),
        ),
        note="GCP and Oracle serve DNS and NTP here too",
    ),
    BuiltIn(ipaddress.ip_address("fd00:ec2::254"), (Service("AWS EC2", ("aws",), CLOUD_INIT + "DataSourceEc2.py"),)),
    BuiltIn(
        ipaddress.ip_address("fd20:ce::254"),
        (Service("GCP", ("gcp",), "only lists of third parties; Google's own pages do not name it", "80, 443"),),
        note="for machines with IPv6 only",
    ),
    BuiltIn(ipaddress.ip_address("fd00:c1::a9fe:a9fe"), (Service("Oracle Cloud", ("oracle",), OCI_SOURCE),)),
    BuiltIn(
        ipaddress.ip_address("fe80::a9fe:a9fe"),
        (
            Service(
                "OpenStack",
                ("openstack",),
                "https://docs.openstack.org/neutron/latest/admin/config-metadata-ipv6.html",
            ),
        ),
        note="link-local: locked on every interface",
    ),
    BuiltIn(
        ipaddress.ip_address("fd00:a9fe:a9fe::1"),
        (Service("Akamai (Linode)", ("akamai",), CLOUD_INIT + "DataSourceAkamai.py"),),
    ),
    BuiltIn(
        ipaddress.ip_address("169.254.42.42"),
        (Service("Scaleway", ("scaleway",), CLOUD_INIT + "DataSourceScaleway.py"),),
        note="user data is served only to source ports below 1024",
    ),
    BuiltIn(ipaddress.ip_address("fd00:42::42"), (Service("Scaleway", ("scaleway",), "systemd, hwdb.d/40-imds.hwdb"),)),
    BuiltIn(
        ipaddress.ip_address("169.254.0.23"),
        (Service("Tencent Cloud", ("tencent",), "https://cloud.tencent.com/document/product/213/4934"),),
        note="metadata.tencentyun.com",
    ),
    BuiltIn(
        ipaddress.ip_address("fd00:100::100:200"),
        (Service("Alibaba Cloud", ("alibaba",), "https://github.com/canonical/cloud-init/pull/6893"),),
        note="for machines with IPv6 only",
    ),
    BuiltIn(
        ipaddress.ip_address("100.100.100.200"),
        (Service("Alibaba Cloud", ("alibaba",), CLOUD_INIT + "DataSourceAliYun.py"),),
        DefaultOn.ITS_CLOUD,
        dmi=("Alibaba Cloud",),
        note="shared address space (RFC 6598)",
    ),
    BuiltIn(
        ipaddress.ip_address("100.96.0.96"),
        (Service("Volcengine, BytePlus", ("volcengine",), "Cilium, pkg/volcengine metadata client"),),
        DefaultOn.ITS_CLOUD,
        dmi=("Volcengine", "BytePlus", "ByteDance"),
        note="shared address space (RFC 6598)",
    ),
    BuiltIn(
        ipaddress.ip_address("192.0.0.192"),
        (
            Service(
                "Oracle Cloud Classic",
                ("oracle-classic",),
                "Oracle Cloud Infrastructure Compute Classic, instance attributes",
            ),
        ),
        DefaultOn.ITS_CLOUD,
        dmi=("OracleCloud",),
        note="IETF protocol assignments (RFC 6890)",
    ),
    BuiltIn(
        WIRESERVER,
        (Service("Azure WireServer, HostGAPlugin", ("azure", "wireserver"), AZURE_SOURCE, "80, 32526"),),
        DefaultOn.ITS_CLOUD,
        # Every Azure machine has this chassis asset tag: is_azure_chassis() in cloud-init's ds-identify.
        dmi=("7783-7084-3265-9085-8269-3286-77",),
        excluded_ports=DNS_AND_DHCP,
        note="a public address that also serves DNS and DHCP; it gets a lock of its own, which always allows user 0",
    ),
    BuiltIn(
        ipaddress.ip_address("169.254.170.2"),
        (Service("AWS ECS task credentials", ("ecs",), BOTOCORE),),
        DefaultOn.NO_MACHINE,
        note="tasks need it",
    ),
    BuiltIn(
        ipaddress.ip_address("169.254.170.23"),
        (Service("AWS EKS Pod Identity", ("eks",), EKS_SOURCE),),
        DefaultOn.NO_MACHINE,
        note="pods need it",
    ),
    BuiltIn(
        ipaddress.ip_address("fd00:ec2::23"),
        (Service("AWS EKS Pod Identity", ("eks",), EKS_SOURCE),),
        DefaultOn.NO_MACHINE,
        note="pods need it",
    ),
)

_BY_ADDRESS: dict[Address, BuiltIn] = {entry.address: entry for entry in BUILT_IN}

DEFAULT_PRESET = "default"
ALL_PRESET = "all"
PRESETS: tuple[str, ...] = (
    DEFAULT_PRESET,
    ALL_PRESET,
    *sorted({name for entry in BUILT_IN for name in entry.presets}),
)


def builtin(address: Address) -> BuiltIn | None:
    """The table's entry for ``address``, which may be IPv4-mapped; or None."""
    return _BY_ADDRESS.get(unmapped(address))


def builtin_at(network: Network) -> BuiltIn | None:
    """The table's entry for a prefix that is a single address; or None."""
    if network.prefixlen != network.max_prefixlen:
        return None
    return builtin(network.network_address)


def default_entries(dmi_text: str) -> tuple[BuiltIn, ...]:
    """The entries that are locked by default on a machine whose DMI is ``dmi_text``."""
    return tuple(
        entry for entry in BUILT_IN if entry.default_on is DefaultOn.EVERY_MACHINE or _is_on_its_cloud(entry, dmi_text)
    )


def default_endpoints(dmi_text: str) -> tuple[Endpoint, ...]:
    """The endpoints that are locked by default on a machine whose DMI is ``dmi_text``."""
    return _endpoints(default_entries(dmi_text))


def preset_endpoints(name: str, dmi_text: str = "") -> tuple[Endpoint, ...]:
    """The endpoints of the preset ``name``; only ``default`` depends on ``dmi_text``. Raises BadPolicy."""
    return _endpoints(_preset_entries(name, dmi_text))


def _preset_entries(name: str, dmi_text: str) -> tuple[BuiltIn, ...]:
    if name == DEFAULT_PRESET:
        return default_entries(dmi_text)
    if name == ALL_PRESET:
        return tuple(entry for entry in BUILT_IN if entry.default_on is not DefaultOn.NO_MACHINE)
    found = tuple(entry for entry in BUILT_IN if name in entry.presets)
    if not found:
        more = did_you_mean(name, PRESETS) or f": choose one of {', '.join(PRESETS)}"
        raise BadPolicy(f"there is no preset {name!r}{more}")
    return found


def _is_on_its_cloud(entry: BuiltIn, dmi_text: str) -> bool:
    folded = dmi_text.casefold()
    return entry.default_on is DefaultOn.ITS_CLOUD and any(text.casefold() in folded for text in entry.dmi)


def _endpoints(entries: Iterable[BuiltIn]) -> tuple[Endpoint, ...]:
    return tuple(sorted((entry.endpoint for entry in entries), key=Endpoint.sort_key))
