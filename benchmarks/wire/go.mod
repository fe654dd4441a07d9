module wire

go 1.22
