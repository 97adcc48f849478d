# packer build imds-guard.pkr.hcl                            with imds-guard_0.1.0_all.deb beside this file
# packer build -var architecture=arm64 imds-guard.pkr.hcl    the same for Graviton; the package is for both
#
# An image that locks the metadata service from its first boot on. Nothing is locked while the image is built, because
# the service is only enabled. For another cloud, change the source; the build stays the same.

variable "architecture" {
  type    = string
  default = "amd64"
}

locals {
  instance_types = {
    amd64 = "t3.small"
    arm64 = "t4g.small"
  }
}

source "amazon-ebs" "debian" {
  ami_name      = "debian-12-imds-guard-${var.architecture}"
  instance_type = local.instance_types[var.architecture]
  region        = "eu-central-1"
  ssh_username  = "admin"

  source_ami_filter {
    filters     = { name = "debian-12-${var.architecture}-*" }
    owners      = ["136693071363"]
    most_recent = true
  }
}

build {
  sources = ["source.amazon-ebs.debian"]

  provisioner "file" {
    source      = "imds-guard_0.1.0_all.deb"
    destination = "/tmp/imds-guard.deb"
  }

  provisioner "shell" {
    execute_command = "sudo sh -eu '{{ .Path }}'"
    inline = [
      "apt-get update",
      "apt-get install -y /tmp/imds-guard.deb",
      "groupadd --system --force canAccessIP",
      "mkdir -p /etc/imds-guard",
      "printf '%s\\n' '[lock.default]' 'preset = \"default\"' 'users = [\"root\"]' 'groups = [\"canAccessIP\"]' >/etc/imds-guard/config.toml",
      "systemctl enable imds-guard.service imds-guard-watch.service imds-guard-verify.timer",
      "imds-guard check --config /etc/imds-guard/config.toml",
    ]
  }
}
