"""column_attention: attention, and the mean over heads of chosen columns of its weights."""
