"""What the commands do: functions that take plain values and return records."""
