module portcullis.invalid/guest

go 1.26
