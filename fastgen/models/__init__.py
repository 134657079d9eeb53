"""Networks: the tri-plane teacher, the convolutional student, the dual discriminator, and their layers."""
