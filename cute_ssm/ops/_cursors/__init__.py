"""What the operators over the cursors of a batch share."""
