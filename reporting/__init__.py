"""What reports and long commands share: progress, figures, files, sizes, and measures of similarity."""
