"""Tools of the project itself, which no installation holds: the build of the pocket base, the picture of the house."""
