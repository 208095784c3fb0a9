"""What the distributed tests run on several ranks of gloo."""
