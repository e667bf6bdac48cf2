// What most people write in Go: a goroutine for each direction and io.Copy, which is splice(2) on Linux.
//
//	relay PORT        a transparent listener on all addresses, IPv4 and IPv6
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"syscall"
)

const ipv6Transparent = 75 // linux/in6.h

func transparent(_, _ string, raw syscall.RawConn) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		failed = syscall.SetsockoptInt(int(fd), syscall.SOL_IPV6, ipv6Transparent, 1)
	})
	if err != nil {
		return err
	}
	return failed
}

func pump(to, from *net.TCPConn, done chan<- struct{}) {
	io.Copy(to, from)
	to.CloseWrite()
	done <- struct{}{}
}

func relay(client *net.TCPConn) {
	defer client.Close()
	upstream, err := net.DialTCP("tcp", nil, client.LocalAddr().(*net.TCPAddr))
	if err != nil {
		return
	}
	defer upstream.Close()
	done := make(chan struct{}, 2)
	go pump(upstream, client, done)
	pump(client, upstream, done)
	<-done
	<-done
}

func main() {
	config := net.ListenConfig{Control: transparent}
	listener, err := config.Listen(context.Background(), "tcp", ":"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("up")
	for {
		client, err := listener.Accept()
		if err != nil {
			continue
		}
		go relay(client.(*net.TCPConn))
	}
}
