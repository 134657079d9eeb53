"""Distillation of a NeRF-GAN into a convolutional student: configuration, data, losses, loop, metrics."""
