# terraform apply -var ami=ami-...    an image of Debian 12 or 13 or Ubuntu 24.04
#
# A machine that locks the metadata service on its first boot, by the user data of ../cloud-init. Beside it the cloud's
# own half: version 2 of the service alone, and one hop, so that no packet for it leaves a container's network.

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
