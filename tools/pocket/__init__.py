"""The trainings behind the pocket base, whose weights the package carries, and the gates they had to pass."""
