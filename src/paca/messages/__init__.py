"""What paca tells people: its error, and the words and numbers that messages share."""
