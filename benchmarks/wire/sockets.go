package main

import (
	"bytes"
	"strconv"
	"syscall"
	"time"
	"unsafe"
)

const mostRead = 256 * 1024

// The bytes of every transfer: a period that no buffer size divides, so that lost or moved bytes are seen.
var pattern = patternOf(1_000_003)

func patternOf(period int) []byte {
	made := make([]byte, 0, period+mostRead)
	state := uint32(1)
	for range period {
		state = state*1664525 + 1013904223
		made = append(made, byte(state>>24))
	}
	return append(made, made[:mostRead]...)
}

// patternAt returns at most mostRead bytes of the endless pattern.
func patternAt(offset, length int) []byte {
	start := offset % (len(pattern) - mostRead)
	return pattern[start : start+min(length, mostRead)]
}

// isPattern says whether at most mostRead bytes are those of the endless pattern.
func isPattern(data []byte, offset int) bool {
	return bytes.Equal(data, patternAt(offset, len(data)))
}

type poller struct {
	fd     int
	events [256]syscall.EpollEvent
}

func newPoller() *poller {
	fd, err := syscall.EpollCreate1(0)
	must(err)
	return &poller{fd: fd}
}

func (p *poller) watch(operation, fd int, events uint32) {
	must(syscall.EpollCtl(p.fd, operation, fd, &syscall.EpollEvent{Events: events, Fd: int32(fd)}))
}

// wait returns what happened within a time; a negative one has no end. (epoll_pwait2: milliseconds are too coarse.)
func (p *poller) wait(longest time.Duration) []syscall.EpollEvent {
	var limit *syscall.Timespec
	if longest >= 0 {
		made := syscall.NsecToTimespec(longest.Nanoseconds())
		limit = &made
	}
	count, _, err := syscall.Syscall6(441, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)),
		uintptr(unsafe.Pointer(limit)), 0, 0)
	if err == syscall.EINTR {
		return nil
	}
	if err != 0 {
		must(err)
	}
	return p.events[:count]
}

func listen(port int) int {
	listener, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK, 0)
	must(err)
	must(syscall.SetsockoptInt(listener, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1))
	must(syscall.Bind(listener, &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}))
	must(syscall.Listen(listener, 1024))
	return listener
}

// accept returns a client, or -1 where it has left already.
func accept(listener int) int {
	fd, _, err := syscall.Accept4(listener, syscall.SOCK_NONBLOCK)
	if err != nil {
		return -1
	}
	must(syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1))
	return fd
}

// blocked says whether an error means "not now".
func blocked(err error) bool {
	return err == syscall.EAGAIN || err == syscall.EINTR
}

// field returns the value of a field of a head, and how many there are of this name (in lower case).
func field(head []byte, name string) ([]byte, int) {
	var value []byte
	count := 0
	for len(head) > 0 {
		line, rest, _ := bytes.Cut(head, []byte("\r\n"))
		head = rest
		if len(line) > len(name) && line[len(name)] == ':' && bytes.EqualFold(line[:len(name)], []byte(name)) {
			value = bytes.TrimSpace(line[len(name)+1:])
			count++
		}
	}
	return value, count
}

// lengthOf returns the Content-Length of a head, 0 where it has none.
func lengthOf(head []byte) int {
	value, count := field(head, "content-length")
	if count != 1 {
		return 0
	}
	length, err := strconv.Atoi(string(value))
	must(err)
	return length
}
