"""What the project itself needs and no installation holds: how the pocket base was built, the picture of the house."""
