"""Statistics on arrays and tables: agreement, overlap, age curves, ComBat, group tests, longitudinal change."""
