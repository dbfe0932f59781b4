"""What answers are worth: functions in TRL's calling convention, each with a name and a weight."""
