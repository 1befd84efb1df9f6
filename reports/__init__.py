"""What a person reads: tables and plots made from stored records. Nothing here loads torch."""
