# SPDX-License-Identifier: Apache-2.0
"""Container runtimes in a guest: for each runtime, mode and caller, who reaches the metadata service.

How a test gets a running runtime: it asks for a fixture of conftest.py. A file of tests in this folder needs nothing
else, and is run by "./run matrix --test vagrant/guest/containers/test_X.py containers-docker", or with another row of
[[containers]] in kernels.toml.

==================  ================================================================================================
fixture             from then on, until the guest ends
==================  ================================================================================================
network (always)    the metadata service at scene.IPV4 and scene.IPV6, in the network namespace "imds" behind a veth:
                    processes of the machine reach it by OUTPUT, bridged containers by FORWARD. The network namespace
                    "pod" is behind another veth. The machine forwards IPv4 and IPv6.
image               scene.ROOT, a folder with busybox, and scene.IMAGE, the same as a tar; /client in it connects
docker              dockerd runs (systemctl start docker), and has the image "client"
podman              podman has the image "localhost/client" for root
podman_rootless     podman has it for the user "allowed"; scene.as_user() runs commands by that user's systemd
containerd          containerd runs, for ctr run --rootfs
firewalld, ufw      are installed and stopped: scene.run("systemctl", "start", "firewalld")
==================  ================================================================================================

scene.run() runs a program; scene.locked("ebpf") and scene.locked("iptables") start and stop imds-guard;
scene.client("root", "allowed", "stranger") is the command to run in a container, and scene.words() reads its output:
``words(run("docker", "run", "--rm", "client", *client("root")).stdout) == ["ECONNREFUSED"]``. The guest has no network
card, which scene.metadata_service() checks.
"""
