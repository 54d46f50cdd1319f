"""From many scans' tables to a study's."""
