"""What a trace knows about single torch calls: what they write to, draw at random, need to know and refuse."""
