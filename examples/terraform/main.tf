# terraform apply -var ami=ami-...    an image of Debian 12 or 13 or Ubuntu 24.04
#
# A machine that locks the metadata service on its first boot, with the user data of ../cloud-init. The cloud's own
# settings help too: only version 2 of the service, and a hop limit of 1, so that packets from a container's network
# don't reach the service.

variable "ami" {
  type = string
}

resource "aws_instance" "guarded" {
  ami           = var.ami
  instance_type = "t3.small"
  user_data     = file("${path.module}/../cloud-init/user-data.yaml")

  metadata_options {
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
}
