"""Kills trainings and breaks their disks, again and again, and checks that nothing is lost: see README.md here."""
