"""Kills trainings and breaks their disks repeatedly, and checks that nothing is lost: see README.md."""
