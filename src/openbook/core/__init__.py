"""What everything else stands on: errors, configuration, files, seeds, progress, device."""
