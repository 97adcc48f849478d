# SPDX-License-Identifier: Apache-2.0
"""Built-in rules for filters: what most people want to keep from most programs."""

from __future__ import annotations

from imds_guard.errors import BadPolicy
from imds_guard.policy.filters import FilterRules

NO_CREDENTIALS = "no-credentials"

_READ = (
    # EC2, and services that speak its language: the root lists the versions. No "GET /*": other services have secrets
    # in a path of one segment (/conf and /user_data of Scaleway, /machine of Azure's 168.63.129.16).
    *("GET /", "GET /latest", "GET /*/meta-data/**", "GET /*/dynamic/**", "PUT /*/api/token"),
    # Google Cloud, Azure, OpenStack.
    *("GET /computeMetadata/**", "GET /metadata/instance/**", "GET /metadata/versions", "GET /openstack/**"),
    *("GET /metadata/scheduledevents", "GET /metadata/loadbalancer"),
)
"""Trees whose secrets are known. Nothing else is passed on, so that an unknown cloud keeps its secrets."""

_AWS = (
    # https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html
    *("/*/meta-data/iam/**", "/*/meta-data/identity-credentials/**", "/*/user-data/**"),
    # Signatures over the identity document: other services take them as the machine's identity.
    # https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-identity-documents.html
    *("/*/dynamic/instance-identity/pkcs7/**", "/*/dynamic/instance-identity/rsa2048/**"),
    "/*/dynamic/instance-identity/signature/**",
    # Roles of tasks (169.254.170.2) and of pods (169.254.170.23).
    # https://docs.aws.amazon.com/AmazonECS/latest/developerguide/task-iam-roles.html
    # https://docs.aws.amazon.com/eks/latest/userguide/pod-id-how-it-works.html
    "/*/credentials/**",
    # Alibaba Cloud and Tencent Cloud have their credentials elsewhere in the same tree.
    # https://www.alibabacloud.com/help/en/ecs/user-guide/view-instance-metadata
    # https://www.tencentcloud.com/document/product/213/4934
    *("/*/meta-data/ram/**", "/*/meta-data/cam/**"),
)
_GCP = (
    # https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
    "/computeMetadata/*/instance/service-accounts/**",
    # Start-up scripts; kube-env of GKE has what a node joins its cluster with.
    # https://cloud.google.com/kubernetes-engine/docs/how-to/protecting-cluster-metadata
    *("/computeMetadata/*/instance/attributes/**", "/computeMetadata/*/project/attributes/**"),
    # Private keys of the workload's certificates.
    # https://cloud.google.com/compute/docs/access/authenticate-workloads-over-mtls
    "/computeMetadata/*/instance/gce-workload-certificates/**",
    "/computeMetadata/*/instance/credentials/**",
    # Version 0.1 had them here; it is switched off.
    *("/*/meta-data/service-accounts/**", "/*/meta-data/attributes/**"),
)
_AZURE = (
    # https://learn.microsoft.com/en-us/entra/identity/managed-identities-azure-resources/how-to-use-vm-token
    "/metadata/identity/**",
    # https://learn.microsoft.com/en-us/azure/virtual-machines/instance-metadata-service
    "/metadata/attested/**",
    *("/metadata/instance/compute/userData/**", "/metadata/instance/compute/customData/**"),
    # The agent's protocol at 168.63.129.16: certificates and protected settings of extensions.
    # https://learn.microsoft.com/en-us/azure/virtual-network/what-is-ip-address-168-63-129-16
    *("/machine/**", "/vmSettings/**"),
)
_OPENSTACK = (
    # https://docs.openstack.org/nova/latest/user/metadata.html
    *("/openstack/*/user_data/**", "/openstack/*/password/**", "/openstack/*/vendor_data.json/**"),
    "/openstack/*/vendor_data2.json/**",
    # Files that were put into the machine when it was made.
    "/openstack/content/**",
    # Nova puts /ec2 in front of every path that does not begin so: it answers /ec2/latest/user-data, too.
    # https://github.com/openstack/nova/blob/master/nova/api/metadata/base.py, lookup()
    *("/ec2/*/user-data/**", "/ec2/*/meta-data/iam/**", "/ec2/*/meta-data/identity-credentials/**"),
    # Huawei Cloud: https://support.huaweicloud.com/intl/en-us/usermanual-ecs/ecs_03_0166.html
    "/openstack/*/securitykey/**",
)

_SETS = {NO_CREDENTIALS: (_READ, (*_AWS, *_GCP, *_AZURE, *_OPENSTACK))}
RULE_SETS = tuple(_SETS)


def expand(rules: FilterRules) -> FilterRules:
    """The rules with those of their built-in sets in place of the names. Raises BadPolicy.

    What a set denies is added. What it allows counts only where the file allows nothing of its own.
    """
    allow, deny = rules.allow, rules.deny
    for name in rules.sets:
        if name not in _SETS:
            raise BadPolicy(f"{name!r} is not a set of rules: known are {', '.join(RULE_SETS)}")
        allowed, denied = _SETS[name]
        allow = allow if rules.allow else (*allow, *allowed)
        deny = (*deny, *denied)
    return rules._replace(allow=tuple(sorted(set(allow))), deny=tuple(sorted(set(deny))), sets=())
