package main

import (
	"bytes"
	"fmt"
	"net"
	"time"
)

type transferred struct {
	Seconds float64 `json:"seconds"` // from the first request to the last byte
	Right   int     `json:"right"`   // transfers whose every byte came as it should
}

type direction func(*net.TCPConn, []byte, int) error

// transfer moves some bytes several times at once, each on a connection that is open already.
func transfer(port int, requests [][]byte, length, atOnce int, move direction) any {
	opened := make([]*net.TCPConn, atOnce)
	for index := range opened {
		one, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
		must(err)
		opened[index] = one.(*net.TCPConn)
	}
	done := make(chan error, atOnce)
	started := time.Now()
	for index, one := range opened {
		go func() { done <- move(one, requests[index%len(requests)], length) }()
	}
	var made transferred
	for range opened {
		if err := <-done; err != nil {
			fail(err.Error())
		}
		made.Right++
	}
	made.Seconds = time.Since(started).Seconds()
	return made
}

func download(one *net.TCPConn, request []byte, length int) error {
	if _, err := one.Write(request); err != nil {
		return err
	}
	came, taken, headed := make([]byte, mostRead/2), 0, false // what comes behind the head is a piece, too
	var head []byte
	for !headed || taken < length {
		count, err := one.Read(came)
		if err != nil {
			return fmt.Errorf("a download ended after %d bytes: %w", taken, err)
		}
		piece := came[:count]
		if !headed {
			head = append(head, piece...)
			end := bytes.Index(head, []byte("\r\n\r\n"))
			if end < 0 {
				continue
			}
			headed, piece = true, head[end+4:]
			if !bytes.HasPrefix(head, []byte("HTTP/1.1 200")) || lengthOf(head[:end+2]) != length {
				return fmt.Errorf("a download was answered with %q", head[:end])
			}
		}
		if !isPattern(piece, taken) {
			return fmt.Errorf("a download is not what was sent, after %d bytes", taken)
		}
		taken += len(piece)
	}
	return nil
}

func upload(one *net.TCPConn, request []byte, length int) error {
	if _, err := one.Write(request); err != nil {
		return err
	}
	for sent := 0; sent < length; {
		count, err := one.Write(patternAt(sent, length-sent))
		if err != nil {
			return fmt.Errorf("an upload ended after %d bytes: %w", sent, err)
		}
		sent += count
	}
	var head []byte
	came := make([]byte, mostRead)
	for {
		count, err := one.Read(came)
		if err != nil {
			return fmt.Errorf("an upload was not answered: %w", err)
		}
		head = append(head, came[:count]...)
		status, body, whole := answer(head)
		if !whole {
			continue
		}
		if want := fmt.Sprintf(`{"bytes":%d}`, length); status != 200 || string(body) != want {
			return fmt.Errorf("an upload was answered with %d %q", status, body)
		}
		return nil
	}
}
