"""What brings agents and experience together: the only rooms that know both contracts."""
