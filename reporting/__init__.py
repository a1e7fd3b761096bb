"""What every report and long command is made of: progress, figures, files, measures of similarity."""
