package main

import (
	"bytes"
	"math/rand"
	"slices"
	"strconv"
	"syscall"
	"time"
)

const lastAnswers = 30 * time.Second

type measured struct {
	PerSecond float64        `json:"per_second"` // answers that came in time
	Statuses  map[string]int `json:"statuses"`   // of all answers
	Wrong     int            `json:"wrong"`      // answers that were not what they had to be
	P50Ms     float64        `json:"p50_ms"`
	P99Ms     float64        `json:"p99_ms"`
}

// A lane is one kept connection; due is when its request was sent, or, in an open loop, when it should have been.
type lane struct {
	fd   int
	came []byte
	due  time.Time
	busy bool
}

type load struct {
	poll      *poller
	lanes     map[int]*lane
	free      []*lane
	waiting   []time.Time
	asks      asks
	chance    *rand.Rand
	latencies []float64
	made      measured
	buffer    []byte
}

// asks is what a load sends, and what it has to be answered; next's bytes are used before it is called again.
type asks interface {
	next(chance *rand.Rand) []byte
	right(status int, body []byte) bool
}

// of is a list of requests, each of which the API answers with the same bytes.
type of struct {
	requests [][]byte
	body     []byte
}

func (o of) next(chance *rand.Rand) []byte { return o.requests[chance.Intn(len(o.requests))] }

func (o of) right(_ int, body []byte) bool { return bytes.Equal(body, o.body) }

// measure loads a server for some seconds: as fast as it answers, or with requests that arrive at a rate.
func measure(port int, what asks, connections int, seconds, perSecond float64) any {
	l := &load{poll: newPoller(), lanes: map[int]*lane{}, asks: what, chance: rand.New(rand.NewSource(6)),
		buffer: make([]byte, mostRead)}
	l.made.Statuses = map[string]int{}
	for range connections {
		one := &lane{fd: dial(port)}
		l.lanes[one.fd] = one
		l.free = append(l.free, one)
		l.poll.watch(syscall.EPOLL_CTL_ADD, one.fd, syscall.EPOLLIN)
	}
	inTime := l.run(time.Duration(seconds*float64(time.Second)), perSecond)
	slices.Sort(l.latencies)
	l.made.PerSecond = float64(inTime) / seconds
	l.made.P50Ms, l.made.P99Ms = l.quantile(0.50), l.quantile(0.99)
	return l.made
}

func dial(port int) int {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	must(err)
	must(syscall.Connect(fd, &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}))
	must(syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1))
	must(syscall.SetNonblock(fd, true))
	return fd
}

func (l *load) run(length time.Duration, perSecond float64) int {
	started := time.Now()
	ends, next, inTime := started.Add(length), started, 0
	for {
		now := time.Now()
		over := now.After(ends)
		if over && len(l.free) == len(l.lanes) {
			return inTime
		}
		if now.After(ends.Add(lastAnswers)) {
			fail("a request was never answered")
		}
		longest := lastAnswers
		if perSecond > 0 && !over {
			for ; !next.After(now); next = next.Add(time.Duration(l.chance.ExpFloat64() / perSecond * 1e9)) {
				l.waiting = append(l.waiting, next)
			}
			longest = next.Sub(now)
		}
		l.send(over, perSecond > 0)
		for _, event := range l.poll.wait(longest) {
			if l.turn(l.lanes[int(event.Fd)]) && !over {
				inTime++
			}
		}
	}
}

func (l *load) send(over, arriving bool) {
	for len(l.free) > 0 && !over && (!arriving || len(l.waiting) > 0) {
		one := l.free[len(l.free)-1]
		l.free = l.free[:len(l.free)-1]
		one.due = time.Now()
		if arriving {
			one.due = l.waiting[0]
			l.waiting = l.waiting[1:]
		}
		request := l.asks.next(l.chance)
		count, err := syscall.Write(one.fd, request)
		must(err)
		if count != len(request) {
			fail("a request did not fit the socket's buffer")
		}
	}
}

// turn reads an answer; true once it is whole.
func (l *load) turn(one *lane) bool {
	count, err := syscall.Read(one.fd, l.buffer)
	if err != nil && blocked(err) {
		return false
	}
	must(err)
	if count == 0 {
		fail("the server closed a connection")
	}
	came := l.buffer[:count]
	if len(one.came) > 0 {
		one.came = append(one.came, came...)
		came = one.came
	}
	status, body, whole := answer(came)
	if !whole {
		if len(one.came) == 0 {
			one.came = append(one.came, came...)
		}
		return false
	}
	l.latencies = append(l.latencies, float64(time.Since(one.due).Nanoseconds())/1e6)
	l.made.Statuses[strconv.Itoa(status)]++
	if !l.asks.right(status, body) {
		l.made.Wrong++
	}
	one.came = one.came[:0]
	l.free = append(l.free, one)
	return true
}

// answer reads an answer that has a Content-Length.
func answer(data []byte) (status int, body []byte, whole bool) {
	end := bytes.Index(data, []byte("\r\n\r\n"))
	if end < 0 {
		return 0, nil, false
	}
	head := data[:end+2]
	length := lengthOf(head)
	if len(data)-end-4 < length {
		return 0, nil, false
	}
	status, err := strconv.Atoi(string(head[9:12]))
	must(err)
	return status, data[end+4:], true
}

func (l *load) quantile(share float64) float64 {
	if len(l.latencies) == 0 {
		return 0
	}
	return l.latencies[int(share*float64(len(l.latencies)-1))]
}
