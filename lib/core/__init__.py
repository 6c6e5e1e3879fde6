"""What every study uses: models and what is done to them, rows, records, claims, statistics, plots."""
